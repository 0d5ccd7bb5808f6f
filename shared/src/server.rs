//! Serves HTTP, 1.1 or 2, on a listener until it is told to stop, and then answers what has begun.

use std::{
    convert::Infallible,
    io::{self, ErrorKind},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::{
    body::Body,
    http::{HeaderValue, Request, header},
    response::Response,
};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Semaphore,
    time::{Instant, timeout_at},
};
use tokio_io_timeout::TimeoutStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::{Service, ServiceExt as _};

use crate::{output::say, settings::Listen};

/// A connection on which no whole request arrives in this time is closed: as long as nginx keeps an
/// idle one, since a client's pool may use it at that very moment.
const IDLE_TIMEOUT: Duration = Duration::from_secs(75);
/// A client that takes nothing for so long is not there any more.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// What one connection may hold of requests that are coming and answers that nobody has taken yet.
const BUFFER: usize = 64 * 1024;
/// How often a client of HTTP/2 is asked whether it is still there, and how long it may think: within
/// `IDLE_TIMEOUT` it has said something.
const PING_INTERVAL: Duration = Duration::from_secs(20);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// Requests at once on one connection of HTTP/2: many callers wait on it.
const STREAMS: u32 = 1000;
/// What the headers of one request may come to, on HTTP/2.
const HEADERS: u32 = 16 * 1024;
/// How long an open connection may still bring a request after the listener is closed.
const LINGER: Duration = Duration::from_millis(500);
/// How long a connection that had begun when the listener began to close may take to be there: a
/// round trip, and a busy machine.
const CLOSING: Duration = Duration::from_millis(50);
/// Connections that may wait to be accepted. One more waits a second until its client tries again, so
/// a burst of callers must fit.
const BACKLOG: u32 = 4096;
/// When the process has no file descriptors left, accepting fails at once, again and again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// When a server stops: first it asks its clients to leave, then it stops listening, then it
/// stops waiting.
#[derive(Clone, Debug)]
pub struct Stop {
    /// From here on each answer carries `Connection: close`.
    pub leaving: CancellationToken,
    /// How long new requests are still taken after that.
    pub grace: Duration,
    /// How long after `leaving` the last answer may be given.
    pub timeout: Duration,
}

/// Among a request's extensions: at which address its connection begins.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub IpAddr);

/// What answers requests: an axum router, or one with something around it.
pub trait App:
    Service<Request<Body>, Response = Response, Error = Infallible, Future: Send> + Clone + Send + 'static
{
}

impl<S> App for S where
    S: Service<Request<Body>, Response = Response, Error = Infallible, Future: Send> + Clone + Send + 'static
{
}

/// Serves `app` until `stop`; returns when every request that had begun is answered, or the time
/// is up.
pub async fn serve(name: &'static str, listener: TcpListener, app: impl App, stop: Stop) {
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(IDLE_TIMEOUT).max_buf_size(BUFFER);
    serve_with(name, listener, app, stop, Protocol::Http1(server)).await;
}

/// As [`serve`], over HTTP/2 that both sides know of beforehand, as gRPC's do.
pub async fn serve_http2(name: &'static str, listener: TcpListener, app: impl App, stop: Stop) {
    let mut server = http2::Builder::new(TokioExecutor::new());
    server
        .timer(TokioTimer::new())
        .keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(HEADERS)
        .max_send_buf_size(BUFFER);
    serve_with(name, listener, app, stop, Protocol::Http2(server)).await;
}

/// Among the extensions of a request over HTTP/2: what it shares with all others of its connection.
#[derive(Clone, Debug)]
pub struct Connection {
    /// For answers that may be large: a client that asks for many and takes none is held up by its
    /// own.
    pub large_answers: Arc<Semaphore>,
}

/// Large answers under way on one connection.
const LARGE_ANSWERS: usize = 16;

#[derive(Clone)]
enum Protocol {
    Http1(http1::Builder),
    Http2(http2::Builder<TokioExecutor>),
}

async fn serve_with(name: &'static str, listener: TcpListener, app: impl App, stop: Stop, server: Protocol) {
    let (connections, tasks) = (GracefulShutdown::new(), TaskTracker::new());
    let leaving = stop.leaving.clone();
    let abandoned = CancellationToken::new();
    let serve_one = |stream: TcpStream, peer: Peer| {
        // An answer is one small packet; it must not wait for the next.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "nodelay");
        }
        let (app, server, leaving, abandoned) = (app.clone(), server.clone(), leaving.clone(), abandoned.clone());
        let watcher = connections.watcher();
        tasks.spawn(async move {
            let mut stream = TimeoutStream::new(stream);
            stream.set_write_timeout(Some(WRITE_TIMEOUT));
            let serving = async {
                match server {
                    Protocol::Http1(server) => {
                        let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
                            request.extensions_mut().insert(peer);
                            let (app, leaving) = (app.clone(), leaving.clone());
                            async move {
                                let response = app.oneshot(request.map(Body::new)).await;
                                response
                                    .map(|response| if leaving.is_cancelled() { closing(response) } else { response })
                            }
                        });
                        watcher.watch(server.serve_connection(TokioIo::new(Box::pin(stream)), service)).await
                    }
                    Protocol::Http2(server) => {
                        // Whoever is there answers pings; who never begins to speak is closed, too.
                        stream.set_read_timeout(Some(IDLE_TIMEOUT));
                        let connection = Connection { large_answers: Arc::new(Semaphore::new(LARGE_ANSWERS)) };
                        let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
                            request.extensions_mut().insert(connection.clone());
                            request.extensions_mut().insert(peer);
                            app.clone().oneshot(request.map(Body::new))
                        });
                        watcher.watch(server.serve_connection(TokioIo::new(Box::pin(stream)), service)).await
                    }
                }
            };
            // One whose client neither takes nor gives anything must not outlive the server.
            match abandoned.run_until_cancelled(serving).await {
                Some(Err(error)) => tracing::debug!(%error, "connection"),
                Some(Ok(())) => {}
                None => tracing::debug!("a connection did not end in time"),
            }
        });
    };

    let deadline = async {
        stop.leaving.cancelled().await;
        tokio::time::sleep(stop.grace).await;
    };
    tokio::pin!(deadline);
    loop {
        tokio::select! {
            biased;
            () = &mut deadline => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, address)) => serve_one(stream, Peer(address.ip().to_canonical())),
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::warn!(%error, server = name, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
    // Connections that the kernel has already accepted for us would be reset with the listener. So
    // nobody new is let in, and who is on the way is waited for.
    refuse_new(&listener);
    let closing = Instant::now() + CLOSING;
    while let Ok(accepted) = timeout_at(closing, listener.accept()).await {
        match accepted {
            Ok((stream, address)) => serve_one(stream, Peer(address.ip().to_canonical())),
            Err(error) => tracing::debug!(%error, server = name, "cannot accept one of the last connections"),
        }
    }
    drop(listener);
    let deadline = Instant::now() + stop.timeout.saturating_sub(stop.grace);
    // A connection may have a request on the way that we have not seen yet; to close it now would
    // leave that unanswered. Busy ones end by themselves with their next answer.
    tasks.close();
    if timeout_at(deadline.min(Instant::now() + LINGER), tasks.wait()).await.is_ok() {
        return;
    }
    if timeout_at(deadline, connections.shutdown()).await.is_err() {
        tracing::warn!(server = name, "not all connections ended in time");
        abandoned.cancel();
    }
}

/// From here on whoever wants to connect hears nothing (and tries again in a second, when nobody
/// listens), while those that the kernel has begun to let in still arrive. Between the last `accept`
/// and the close there is otherwise always time for one more, which would be reset.
#[cfg(target_os = "linux")]
fn refuse_new(listener: &TcpListener) {
    use socket2::SockFilter;
    // Classic BPF, see socket(7), SO_ATTACH_FILTER, and linux/filter.h. It sees the TCP header; a
    // connection inherits it, but no packet of one that stands has the bit SYN.
    let without_syn = [
        SockFilter::new(0x30, 0, 0, 13),       // load the byte of the flags
        SockFilter::new(0x45, 0, 1, 0x02),     // has it SYN?
        SockFilter::new(0x06, 0, 0, 0),        // drop the packet
        SockFilter::new(0x06, 0, 0, u32::MAX), // keep all of it
    ];
    if let Err(error) = SockRef::from(listener).attach_filter(&without_syn) {
        tracing::debug!(%error, "new connections may be reset when the listener closes");
    }
}

#[cfg(not(target_os = "linux"))]
fn refuse_new(_listener: &TcpListener) {}

fn closing(mut response: Response) -> Response {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// Binds where a setting says, and says on stdout where that is, as `name`: with port 0 nobody could know
/// otherwise. All interfaces are those of both families, where the system has both.
///
/// # Errors
/// When the address is taken; the message names it and the setting to change.
pub async fn bind(name: &str, setting: &str, listen: Listen) -> anyhow::Result<Vec<TcpListener>> {
    let listeners = match listen {
        Listen::Off => Vec::new(),
        Listen::At(address) => vec![listener(address).map_err(|error| taken(setting, address, error))?],
        Listen::Loopback(port) => on_loopback(setting, port)?,
    };
    for listener in &listeners {
        // A service goes on, whoever reads what it says.
        let _ = say(&format!("{name}: listening on {}", listener.local_addr()?));
    }
    Ok(listeners)
}

fn taken(setting: &str, address: SocketAddr, error: io::Error) -> anyhow::Error {
    let what = format!("cannot listen on {address}; set {setting} to another port, or to 0 for a free one");
    anyhow::Error::new(error).context(what)
}

/// The same port in both families; a free one may take some attempts.
fn on_loopback(setting: &str, port: u16) -> anyhow::Result<Vec<TcpListener>> {
    const ATTEMPTS: usize = 20;
    let refused = |address: SocketAddr| move |error| taken(setting, address, error);
    let mut attempt = 1;
    loop {
        let address = (Ipv4Addr::LOCALHOST, port).into();
        let first = listener(address).map_err(refused(address))?;
        let address = (Ipv6Addr::LOCALHOST, first.local_addr()?.port()).into();
        match listener(address) {
            Ok(second) => return Ok(vec![first, second]),
            Err(error) if is_without_ipv6(&error) => return Ok(vec![first]),
            Err(_) if port == 0 && attempt < ATTEMPTS => attempt += 1,
            Err(error) => return Err(taken(setting, address, error)),
        }
    }
}

fn listener(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    let bound = socket.and_then(|socket| {
        if address.ip() == Ipv6Addr::UNSPECIFIED {
            // Whatever the system's default is.
            SockRef::from(&socket).set_only_v6(false)?;
        }
        // As a restart needs it: connections of the last process may linger.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    });
    match bound {
        Err(error) if address.ip() == Ipv6Addr::UNSPECIFIED && is_without_ipv6(&error) => {
            listener((Ipv4Addr::UNSPECIFIED, address.port()).into())
        }
        bound => bound,
    }
}

/// A system that was built or started without IPv6 has no such sockets; one where it is switched off has no
/// address for them.
fn is_without_ipv6(error: &io::Error) -> bool {
    const EAFNOSUPPORT: i32 = if cfg!(target_os = "linux") { 97 } else { 47 };
    error.kind() == ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(EAFNOSUPPORT)
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinSet;

    use super::*;

    /// More than fit where nobody asks for room (128), and no more files than a process usually may have.
    const BURST: usize = 500;

    #[tokio::test]
    async fn a_port_alone_is_one_of_both_families() {
        for (listen, count) in [("0".parse().expect("a port"), 1), (Listen::Loopback(0), 2)] {
            let listeners = bind("test", "TEST_PORT", listen).await.expect("a listener");
            assert_eq!(listeners.len(), count);
            let port = listeners[0].local_addr().expect("its address").port();
            for address in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
                TcpStream::connect((address, port)).await.expect("a connection");
            }
            // Of a family alone, beside it or not, it is taken.
            for listen in [Listen::Loopback(port), format!("[::1]:{port}").parse().expect("an address")] {
                let told = format!("{:#}", bind("test", "TEST_PORT", listen).await.expect_err("taken"));
                assert!(told.contains("TEST_PORT") && told.contains(&format!(":{port};")), "{told}");
            }
        }
    }

    #[tokio::test]
    async fn a_burst_of_callers_is_let_in_though_none_is_accepted_yet() {
        for address in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            let listener = listener((address, 0).into()).expect("a listener");
            let to = listener.local_addr().expect("its address");
            let mut callers = JoinSet::new();
            for _ in 0..BURST {
                callers.spawn(TcpStream::connect(to));
            }
            let mut connected = Vec::new();
            let until = Instant::now() + Duration::from_secs(20);
            while let Ok(Some(caller)) = timeout_at(until, callers.join_next()).await {
                connected.push(caller.expect("no panic").expect("a connection"));
            }
            assert_eq!(connected.len(), BURST, "to {to}");
        }
    }
}
