"""What distilled sets are worth beyond one accuracy: diversity, embeddings, class-incremental learning."""
