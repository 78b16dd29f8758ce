"""What everything else stands on: errors, settings' bounds, files, locks, hosts, the mesh, the command line."""
