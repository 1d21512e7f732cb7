"""From a hub name or a folder to rows, splits, the order of rows and batches. `splits.load_task` is where to start."""
