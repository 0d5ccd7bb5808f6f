//! A PgBouncer of a test's own, in front of the tests' PostgreSQL.

use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use tokio::net::TcpStream;
use tokio_postgres::{Config, config::Host};
use uuid::Uuid;

use crate::database::Dsn;
use crate::wait::eventually;

/// Gone when dropped.
pub struct PgBouncer {
    server: Child,
    port: u16,
    file: PathBuf,
}

impl PgBouncer {
    /// `pool_mode` is `session`, `transaction` or `statement`; all else is as Debian has it.
    pub async fn start(to: &Dsn, pool_mode: &str) -> Self {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
        let port = port.expect("a free port").port();
        let file = std::env::temp_dir().join(format!("orderstream-test-pgbouncer-{}.ini", Uuid::now_v7().simple()));
        let settings = format!(
            "[databases]\n* = {}\n\
             [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
             auth_type = any\npool_mode = {pool_mode}\nmax_client_conn = 500\ndefault_pool_size = 100\n",
            keywords(to)
        );
        std::fs::write(&file, settings).expect("its settings");
        let mut command = Command::new("pgbouncer");
        // It refuses to be root.
        if is_root() {
            command.args(["-u", "nobody"]);
        }
        let server = command.arg(&file).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let server = server.expect("pgbouncer (deploy/test installs it)");
        eventually("PgBouncer to listen", || async {
            TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.map(drop).map_err(|error| error.to_string())
        })
        .await;
        Self { server, port, file }
    }

    /// The way to a database of that server through this.
    pub fn dsn(&self, to: &Dsn) -> Dsn {
        to.with_address(&format!("127.0.0.1:{}", self.port))
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = std::fs::remove_file(&self.file);
    }
}

/// The server and its user, as PgBouncer wants to hear of them.
fn keywords(to: &Dsn) -> String {
    let config: Config = to.to_string().parse().expect("a DSN");
    let [Host::Tcp(host)] = config.get_hosts() else { panic!("one host in {:?}", config.get_hosts()) };
    let port = config.get_ports().first().copied().unwrap_or(5432);
    let user = config.get_user().expect("a user");
    let password = config.get_password().map(String::from_utf8_lossy);
    let password = password.map(|password| format!(" password='{password}'")).unwrap_or_default();
    format!("host={host} port={port} user={user}{password}")
}

fn is_root() -> bool {
    let id = Command::new("id").arg("-u").output().expect("id");
    id.stdout.trim_ascii() == b"0"
}
