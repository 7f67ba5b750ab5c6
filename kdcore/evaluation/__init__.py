"""What a student is worth: measured on rows it was never trained on."""
