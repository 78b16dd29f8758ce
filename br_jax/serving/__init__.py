"""A provider's service: users' files in, adapters that were looked at out."""
