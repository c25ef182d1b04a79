"""What fine-tuning minimises, one file for each family."""
