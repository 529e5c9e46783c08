"""Reading, checking and resolving plans: no torch, no files but the plan and a checkpoint's headers."""
