"""Images and labels: data sets, subsets, distilled sets, initial images, training batches."""
