//! `grpc.health.v1.Health`: does this process take orders? So from its start until it leaves.

use std::pin::Pin;

use futures_util::{Stream, stream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, async_trait, server::NamedService};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus, health_server::Health,
};

use super::proto::{
    order::order_service_server::SERVICE_NAME as ORDER,
    orders::service::v1::orders_service_server::SERVICE_NAME as ORDERS,
};

pub(super) struct Service {
    pub started: CancellationToken,
    pub leaving: CancellationToken,
}

impl NamedService for Service {
    const NAME: &'static str = tonic_health::pb::health_server::SERVICE_NAME;
}

#[async_trait]
impl Health for Service {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        if !is_known(&request.get_ref().service) {
            return Err(Status::not_found("there is no such service"));
        }
        Ok(Response::new(answer(now(&self.started, &self.leaving))))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    /// Tells each change, and ends with the last.
    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let is_known = is_known(&request.get_ref().service);
        let (started, leaving) = (self.started.clone(), self.leaving.clone());
        let changes = stream::unfold(None, move |told| {
            let (started, leaving) = (started.clone(), leaving.clone());
            async move {
                let next = match told {
                    None if is_known => now(&started, &leaving),
                    None => ServingStatus::ServiceUnknown,
                    Some(ServingStatus::NotServing) => tokio::select! {
                        biased;
                        () = leaving.cancelled() => return None,
                        () = started.cancelled() => ServingStatus::Serving,
                    },
                    Some(ServingStatus::Serving) => {
                        leaving.cancelled().await;
                        ServingStatus::NotServing
                    }
                    Some(ServingStatus::ServiceUnknown | ServingStatus::Unknown) => {
                        leaving.cancelled().await;
                        return None;
                    }
                };
                Some((Ok(answer(next)), Some(next)))
            }
        });
        Ok(Response::new(Box::pin(changes)))
    }
}

fn is_known(service: &str) -> bool {
    ["", ORDERS, ORDER, Service::NAME].contains(&service)
}

fn now(started: &CancellationToken, leaving: &CancellationToken) -> ServingStatus {
    if started.is_cancelled() && !leaving.is_cancelled() { ServingStatus::Serving } else { ServingStatus::NotServing }
}

fn answer(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}
