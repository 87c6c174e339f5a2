//! The command `kore-vljepa`.

fn main() {}
