//! cluster-tree
