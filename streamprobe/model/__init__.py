"""The frozen model: cut off above the deepest probed layer, listened to by hooks."""
