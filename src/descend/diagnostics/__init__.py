"""What an optimizer holds, shown."""
