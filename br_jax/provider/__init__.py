"""What a provider keeps and what it hands on: its folder, and adapters and models written for others."""
