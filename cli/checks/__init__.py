"""What ``gossamer doctor`` looks at: one module for each part of the world that a node stands on."""
