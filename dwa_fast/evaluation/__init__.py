"""Evaluations beyond accuracy: diversity, embeddings, class-incremental learning."""
