"""A teacher's answers on disk: writers of shards, the reader of shards and manifests, conversions, inspection."""
