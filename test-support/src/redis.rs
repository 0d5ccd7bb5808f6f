//! A Redis of a test's own, to be killed, frozen and emptied.

use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, Stdio};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::wait::eventually;

/// Gone with its data when dropped.
pub struct PrivateRedis {
    server: Child,
    port: u16,
}

impl PrivateRedis {
    pub async fn start() -> Self {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
        let port = port.expect("a free port").port();
        let redis = Self { server: spawn(port), port };
        redis.wait_until_up().await;
        redis
    }

    /// As `REDIS_ADDR` has it.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn kill(&mut self) {
        self.server.kill().expect("killing Redis");
        self.server.wait().expect("its end");
    }

    /// At the same address, empty.
    pub async fn start_again(&mut self) {
        self.server = spawn(self.port);
        self.wait_until_up().await;
    }

    /// Stands still: its connections stay, and nothing is answered.
    pub fn freeze(&self) {
        self.signal("STOP");
    }

    pub fn thaw(&self) {
        self.signal("CONT");
    }

    pub async fn flush(&self) {
        self.ask("FLUSHALL").await.expect("an answer");
    }

    /// How many keys there are.
    pub async fn size(&self) -> u64 {
        let answer = self.ask("DBSIZE").await.expect("an answer");
        answer.trim_start_matches(':').parse().unwrap_or_else(|_| panic!("a number: {answer}"))
    }

    fn signal(&self, name: &str) {
        let pid = self.server.id();
        let status = Command::new("sh").args(["-c", &format!("kill -{name} {pid}")]).status();
        assert!(status.is_ok_and(|status| status.success()), "{name} to process {pid}");
    }

    /// The first line of the answer to an inline command (Redis serialization protocol).
    pub async fn ask(&self, command: &str) -> std::io::Result<String> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await?;
        stream.write_all(format!("{command}\r\n").as_bytes()).await?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n") {
            if stream.read_buf(&mut answer).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(String::from_utf8_lossy(&answer).trim().to_owned())
    }

    async fn wait_until_up(&self) {
        eventually("Redis answers", || async {
            match self.ask("PING").await {
                Ok(answer) if answer == "+PONG" => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    }
}

impl Drop for PrivateRedis {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn spawn(port: u16) -> Child {
    Command::new("redis-server")
        .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port", &port.to_string()])
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-server (deploy/test installs it)")
}
