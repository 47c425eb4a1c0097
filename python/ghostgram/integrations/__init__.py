"""In-Run Data Shapley in other people's training loops, one file each; it imports what it is named after."""
