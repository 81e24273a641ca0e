"""Floor 4: one optimizer step, the loop around it, and what is saved. It never learns a method's name."""
