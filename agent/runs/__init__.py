"""Parts of benchmarks as processes: their directories, the load generator's own process, and who watches over them."""
