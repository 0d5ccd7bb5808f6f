//! The transport of the tests' gRPC clients: hyper, as everything else here. The transport that comes with tonic asks
//! for features of tonic and tower that no release has, so both would be compiled once more for the tests.

use std::task::{Context, Poll};

use hyper::body::Incoming;
use hyper::http::uri::{Authority, Uri};
use hyper::{Request, Response};
use hyper_util::client::legacy::{Client, Error, ResponseFuture, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;
use tonic::body::Body;

/// One connection of HTTP/2, made with the first call. A call that fails is not made again.
#[derive(Clone, Debug)]
pub(crate) struct Channel {
    client: Client<HttpConnector, Body>,
    address: Authority,
}

impl Channel {
    pub(crate) fn to(address: &str) -> Self {
        let mut connector = HttpConnector::new();
        // Or each call of a few bytes waits 40 ms for the acknowledgement of the last.
        connector.set_nodelay(true);
        let client =
            Client::builder(TokioExecutor::new()).http2_only(true).retry_canceled_requests(false).build(connector);
        Self { client, address: address.parse().expect("an address") }
    }
}

impl tower::Service<Request<Body>> for Channel {
    type Response = Response<Incoming>;
    type Error = Error;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    /// The request names the method alone, as its path.
    fn call(&mut self, mut request: Request<Body>) -> ResponseFuture {
        let path = request.uri().path_and_query().expect("a method").clone();
        let uri = Uri::builder().scheme("http").authority(self.address.clone()).path_and_query(path);
        *request.uri_mut() = uri.build().expect("a URI");
        self.client.request(request)
    }
}
