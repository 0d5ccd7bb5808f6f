//! gRPC beside HTTP: the same use cases in the words of `proto/`, health and reflection.

mod call;
mod health;
mod orders;
mod saga;
mod status;

use axum::{
    Router,
    body::Body,
    extract::Request,
    middleware::{Next, from_fn, from_fn_with_state},
    response::Response,
};
use futures_util::StreamExt as _;
use tonic::{Status, server::NamedService};
use tonic_health::pb::health_server::HealthServer;
use tonic_reflection::server::Builder as Reflection;
use tower_http::catch_panic::CatchPanicLayer;

use crate::{error::Problem, http::App};
use proto::{
    order::order_service_server::OrderServiceServer, orders::service::v1::orders_service_server::OrdersServiceServer,
};

/// A health check names a service, and a question about the API a file or a symbol.
const QUESTION_BYTES: usize = 4096;

/// Generated from `proto/` by `make proto`.
#[allow(unused_qualifications, clippy::all)]
mod proto {
    pub mod order {
        include!("grpc/proto/order.rs");
    }
    pub mod orders {
        pub mod models {
            pub mod v1 {
                include!("grpc/proto/orders.models.v1.rs");
            }
        }
        pub mod service {
            pub mod v1 {
                include!("grpc/proto/orders.service.v1.rs");
            }
        }
    }
    pub const DESCRIPTORS: &[u8] = include_bytes!("grpc/proto/descriptors.bin");
}

/// # Errors
/// When what `proto/` was compiled to makes no sense, which tests would show.
pub(crate) fn router(app: App) -> anyhow::Result<Router> {
    let limit = app.max_body_bytes;
    let orders = OrdersServiceServer::new(orders::Service(app.clone())).max_decoding_message_size(limit);
    let saga = OrderServiceServer::new(saga::Service(app.clone())).max_decoding_message_size(limit);
    let health = health::Service { started: app.started.clone(), leaving: app.leaving.clone() };
    let health = HealthServer::new(health).max_decoding_message_size(QUESTION_BYTES);
    let reflection = || {
        Reflection::configure()
            .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // What details of refusals are made of.
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
    };
    let v1 = reflection().build_v1()?.max_decoding_message_size(QUESTION_BYTES);
    // The one that older tools ask.
    let v1alpha = reflection().build_v1alpha()?.max_decoding_message_size(QUESTION_BYTES);

    // A conversation has no end of its own; this is over when we are.
    let leaving = app.leaving.clone();
    let until_leaving = from_fn(move |request: Request, next: Next| {
        let leaving = leaving.clone().cancelled_owned();
        next.run(request.map(|body| Body::from_stream(body.into_data_stream().take_until(leaving))))
    });
    let reflection = Router::new()
        .route_service(&methods(&v1), v1)
        .route_service(&methods(&v1alpha), v1alpha)
        .route_layer(until_leaving);
    Ok(Router::new()
        .route_service(&methods(&orders), orders)
        .route_service(&methods(&saga), saga)
        // Whatever is above is for those who may, and one message at a time.
        .route_layer(from_fn_with_state(app, call::admit))
        .route_service(&methods(&health), health)
        .merge(reflection)
        .fallback(|| async {
            let problem = Problem::UnknownRoute("reflection names the services and methods that there are");
            Status::from(problem).into_http::<Body>()
        })
        .layer(CatchPanicLayer::custom(panicked)))
}

fn methods<S: NamedService>(_: &S) -> String {
    format!("/{}/{{method}}", S::NAME)
}

fn panicked(panic: Box<dyn std::any::Any + Send>) -> Response {
    crate::http::log_panic(&*panic);
    Status::from(Problem::Internal).into_http()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use xxhash_rust::xxh3::xxh3_64;

    #[test]
    fn the_generated_code_is_of_these_sources() {
        let proto = concat!(env!("CARGO_MANIFEST_DIR"), "/../proto");
        let mut listed = 0;
        for line in include_str!("grpc/proto/sources.xxh3").lines() {
            let (digest, source) = line.split_once("  ").expect("a digest and a file");
            let text = fs::read(format!("{proto}/{source}")).unwrap();
            assert_eq!(format!("{:016x}", xxh3_64(&text)), digest, "proto/{source} has changed: run `make proto`");
            listed += 1;
        }
        let folders = fs::read_dir(proto).unwrap().map(|folder| folder.unwrap().path());
        let files = folders.flat_map(|folder| fs::read_dir(folder).unwrap()).map(|file| file.unwrap().path());
        let sources = files.filter(|file| file.extension().is_some_and(|extension| extension == "proto")).count();
        assert_eq!(listed, sources, "a file of proto/ is not generated from: see proto/generate");
    }
}
