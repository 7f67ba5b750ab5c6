"""Models after training: copies in other formats, and upload to the hub."""
