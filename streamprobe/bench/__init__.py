"""What streamprobe costs beside the bare forward pass, and beside the usual way over files."""
