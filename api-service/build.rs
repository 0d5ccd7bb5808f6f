//! Compiles `proto/`, without protoc.

use std::{env, error::Error, fs, path::Path};

const INCLUDES: &str = "../proto";
const FILES: [&str; 2] = ["order/order.proto", "orders/service.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={INCLUDES}");
    let files = protox::Compiler::new([INCLUDES])?
        .include_imports(true)
        .include_source_info(true)
        .open_files(FILES)?
        .file_descriptor_set();
    // What reflection tells; comments are left out of it.
    let bare = protox::Compiler::new([INCLUDES])?.include_imports(true).open_files(FILES)?.encode_file_descriptor_set();
    fs::write(Path::new(&env::var("OUT_DIR")?).join("descriptors.bin"), bare)?;
    tonic_prost_build::configure().build_client(false).build_transport(false).compile_fds(files)?;
    Ok(())
}
