"""What the package asks of the machine: files, console, hardware."""
