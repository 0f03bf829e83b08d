"""From cluster centroids to the keep bitmap of a Plan."""
