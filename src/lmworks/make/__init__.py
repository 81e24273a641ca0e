"""Floor 5: documents out of documents: the runner of `lmworks data`, over stages of any folder and any executor."""
