//! A TCP proxy that can be cut, frozen and restored: the network, broken on purpose.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Bytes pass.
    Open,
    /// Connections are closed, new ones at once: the server is down.
    Cut,
    /// Connections stay and nothing passes: a cable was pulled.
    Frozen,
    /// What the client says passes, what the server answers does not: the outcome stays unknown.
    RepliesHeld,
    /// Bytes pass, each lot of them so much later: a server far away.
    Slow(Duration),
}

pub struct Proxy {
    address: SocketAddr,
    upstream: watch::Sender<String>,
    mode: watch::Sender<Mode>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    /// In front of `upstream` (`host:port`), open.
    pub async fn to(upstream: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("binding a proxy");
        Self::with_listener(listener, upstream)
    }

    /// For a server that advertises an address (Kafka): the proxy has to be at that one.
    pub fn with_listener(listener: TcpListener, upstream: &str) -> Self {
        let address = listener.local_addr().expect("a bound listener has an address");
        let (upstream, upstreams) = watch::channel(upstream.to_owned());
        let (mode, modes) = watch::channel(Mode::Open);
        let accepting = tokio::spawn(accept(listener, upstreams, modes));
        Self { address, upstream, mode, accepting }
    }

    /// New connections lead to another server from now on. Those that are there stay where they are, as with
    /// an address that moves.
    pub fn lead_to(&self, upstream: &str) {
        self.upstream.send_replace(upstream.to_owned());
    }

    /// `host:port` for the client.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    pub fn cut(&self) {
        self.set(Mode::Cut);
    }

    pub fn freeze(&self) {
        self.set(Mode::Frozen);
    }

    pub fn restore(&self) {
        self.set(Mode::Open);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.mode.send_replace(Mode::Cut);
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, upstream: watch::Receiver<String>, modes: watch::Receiver<Mode>) {
    while let Ok((client, _)) = listener.accept().await {
        if *modes.borrow() == Mode::Cut {
            continue;
        }
        let upstream = upstream.borrow().clone();
        tokio::spawn(carry(client, upstream, modes.clone()));
    }
}

async fn carry(client: TcpStream, upstream: String, mut modes: watch::Receiver<Mode>) {
    let Ok(server) = TcpStream::connect(&upstream).await else {
        return;
    };
    for stream in [&client, &server] {
        let _ = stream.set_nodelay(true);
    }
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let requests = copy(from_client, to_server, modes.clone(), |mode| mode != Mode::Frozen);
    let replies = copy(from_server, to_client, modes.clone(), |mode| matches!(mode, Mode::Open | Mode::Slow(_)));
    tokio::select! {
        () = async { tokio::join!(requests, replies); } => {}
        _ = modes.wait_for(|mode| *mode == Mode::Cut) => {}
    }
}

async fn copy(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut modes: watch::Receiver<Mode>,
    passes: fn(Mode) -> bool,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(read) => read,
        };
        // After the read: bytes that arrive while frozen are the ones to hold.
        let Ok(mode) = modes.wait_for(|mode| passes(*mode)).await.map(|mode| *mode) else {
            break;
        };
        if let Mode::Slow(later) = mode {
            tokio::time::sleep(later).await;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn echo_server() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("binding");
        let address = listener.local_addr().expect("bound").to_string();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut read, mut write) = stream.into_split();
                    tokio::io::copy(&mut read, &mut write).await
                });
            }
        });
        address
    }

    async fn echo(stream: &mut TcpStream) -> std::io::Result<u8> {
        stream.write_u8(7).await?;
        stream.read_u8().await
    }

    #[tokio::test]
    async fn a_cut_connection_is_closed_and_a_new_one_works_after_restoring() {
        let proxy = Proxy::to(&echo_server().await).await;
        let mut stream = TcpStream::connect(proxy.address()).await.expect("connecting");
        assert_eq!(echo(&mut stream).await.expect("open"), 7);
        proxy.cut();
        assert!(stream.read_u8().await.is_err());
        proxy.restore();
        let mut stream = TcpStream::connect(proxy.address()).await.expect("connecting");
        assert_eq!(echo(&mut stream).await.expect("open"), 7);
    }

    #[tokio::test]
    async fn a_frozen_connection_stays_and_goes_on_later() {
        let proxy = Proxy::to(&echo_server().await).await;
        let mut stream = TcpStream::connect(proxy.address()).await.expect("connecting");
        proxy.freeze();
        let silent = tokio::time::timeout(Duration::from_millis(50), echo(&mut stream)).await;
        assert!(silent.is_err());
        proxy.restore();
        assert_eq!(stream.read_u8().await.expect("the held byte"), 7);
    }

    #[tokio::test]
    async fn new_connections_go_where_the_address_leads_now() {
        let proxy = Proxy::to("127.0.0.1:1").await;
        let mut nowhere = TcpStream::connect(proxy.address()).await.expect("connecting");
        assert!(nowhere.read_u8().await.is_err());
        proxy.lead_to(&echo_server().await);
        let mut stream = TcpStream::connect(proxy.address()).await.expect("connecting");
        assert_eq!(echo(&mut stream).await.expect("open"), 7);
        proxy.set(Mode::Slow(Duration::from_millis(20)));
        let asked = tokio::time::Instant::now();
        assert_eq!(echo(&mut stream).await.expect("slow"), 7);
        assert!(asked.elapsed() >= Duration::from_millis(40));
    }
}
