"""`make demo`: fine-tune real models, measure their Fishers, merge them, and say what the merged models can do."""
