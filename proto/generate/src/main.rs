//! Generates the Rust code of `proto/*/*.proto`, without protoc. Run it with `make proto` after a change of a
//! `.proto` file and commit the result. The build does not generate: the nineteen crates that this takes would be
//! compiled wherever OrderStream is.

use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use xxhash_rust::xxh3::xxh3_64;

const ROOTS: [&str; 2] = ["order/order.proto", "orders/service.proto"];
const SOURCES: [&str; 3] = ["order/order.proto", "orders/models.proto", "orders/service.proto"];

fn main() -> Result<(), Box<dyn Error>> {
    let proto = Path::new(env!("CARGO_MANIFEST_DIR")).parent().ok_or("no folder above this one")?;
    let root = proto.parent().ok_or("no folder above proto/")?;
    let files = protox::Compiler::new([proto])?
        .include_imports(true)
        .include_source_info(true)
        .open_files(ROOTS)?
        .file_descriptor_set();

    let server = root.join("api-service/src/grpc/proto");
    fs::create_dir_all(&server)?;
    let build = tonic_prost_build::configure().build_client(false).build_transport(false);
    build.out_dir(&server).compile_fds(files.clone())?;
    // Server reflection sends the descriptors. They do without the comments.
    let bare = protox::Compiler::new([proto])?.include_imports(true).open_files(ROOTS)?.encode_file_descriptor_set();
    fs::write(server.join("descriptors.bin"), bare)?;

    let client = root.join("e2e/tests/it/grpc/proto");
    fs::create_dir_all(&client)?;
    let build = tonic_prost_build::configure().build_server(false).build_transport(false);
    build.out_dir(&client).compile_fds(files)?;

    // A test of api-service compares these digests with the sources.
    let mut digests = String::new();
    for source in SOURCES {
        writeln!(digests, "{:016x}  {source}", xxh3_64(&fs::read(proto.join(source))?))?;
    }
    fs::write(server.join("sources.xxh3"), digests)?;
    Ok(())
}
