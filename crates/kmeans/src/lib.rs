//! kmeans
