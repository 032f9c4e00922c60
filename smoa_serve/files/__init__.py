"""Files that anybody may have written, and folders that appear complete or not at all."""
