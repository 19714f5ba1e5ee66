"""Read an optimizer's checkpoint without running code from it; say what it holds, looks wrong, and changed."""
