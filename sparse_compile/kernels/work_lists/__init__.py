"""From the keep bitmap of a Plan to what an attention kernel walks: pieces of keys and tiles of queries."""
