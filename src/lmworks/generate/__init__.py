"""Floor 3: text from models: sampling, decoding with a cache, chat templates."""
