//! Compiles `proto/` into the client that the tests call with.

use std::error::Error;

const INCLUDES: &str = "../proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={INCLUDES}");
    let files = protox::compile(["order/order.proto", "orders/service.proto"], [INCLUDES])?;
    tonic_prost_build::configure().build_server(false).build_transport(false).compile_fds(files)?;
    Ok(())
}
