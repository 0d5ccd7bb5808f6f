//! `orders.service.v1.OrdersService`: create, update, delete, look up.

use std::fmt::Display;

use serde::Serialize;
use time::format_description::well_known::Rfc3339;
use tonic::{Request, Response, Status, async_trait};

use super::{
    call::{Call, with_done, with_order},
    proto::orders::{
        models::v1::OrderModel,
        service::v1::{
            GetOrderByExternalIdRequest, GetOrderByExternalIdResponse, GetOrderByIdRequest, GetOrderByIdResponse,
            HealthRequest, HealthResponse, UpsertOrderRequest, UpsertOrderResponse,
            orders_service_server::OrdersService,
        },
    },
};
use crate::{
    error::Problem,
    http::{
        App,
        reads::{find, find_by_external},
    },
    request,
    store::read::Order,
};

pub(super) struct Service(pub App);

/// The message as the body of `POST /orders` that it stands for.
#[derive(Serialize)]
struct Body<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    order_id: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    user_id: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    status: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    payload_json: &'a str,
}

#[async_trait]
impl OrdersService for Service {
    async fn health(&self, _: Request<HealthRequest>) -> Result<Response<HealthResponse>, Status> {
        Ok(Response::new(HealthResponse { status: "ok".to_owned() }))
    }

    async fn upsert_order(
        &self,
        request: Request<UpsertOrderRequest>,
    ) -> Result<Response<UpsertOrderResponse>, Status> {
        let (call, message) = Call::new(request)?;
        let UpsertOrderRequest { order_id, user_id, status, payload_json } = &message;
        let body = serde_json::to_vec(&Body { order_id, user_id, status, payload_json });
        let body = body.map_err(|_| Problem::Internal)?; // texts always serialize
        let upsert = request::parse(&body, &call.caller, &self.0.defaults).map_err(Problem::from)?;
        drop(message);
        let (done, applied) = call.submit(&self.0, upsert, body).await?;
        let answer =
            UpsertOrderResponse { order_id: done.order_id.to_string(), status: done.operation.name().to_owned() };
        Ok(with_done(answer, &done, applied))
    }

    async fn get_order_by_id(
        &self,
        request: Request<GetOrderByIdRequest>,
    ) -> Result<Response<GetOrderByIdResponse>, Status> {
        let (call, message) = Call::new(request)?;
        let held = call.large_answer().await;
        let order = find(&self.0, &call.caller, &message.order_id).await?;
        let version = order.version;
        Ok(with_order(GetOrderByIdResponse { order: Some(model(order)?) }, version, held))
    }

    async fn get_order_by_external_id(
        &self,
        request: Request<GetOrderByExternalIdRequest>,
    ) -> Result<Response<GetOrderByExternalIdResponse>, Status> {
        let (call, message) = Call::new(request)?;
        let held = call.large_answer().await;
        let user_id = Some(message.user_id.as_str()).filter(|user_id| !user_id.is_empty());
        let order = find_by_external(&self.0, &call.caller, user_id, &message.external_id).await?;
        let version = order.version;
        Ok(with_order(GetOrderByExternalIdResponse { order: Some(model(order)?) }, version, held))
    }
}

fn model(order: Order) -> Result<OrderModel, Problem> {
    let time = |time: time::OffsetDateTime| time.format(&Rfc3339).map_err(|_| Problem::Internal);
    Ok(OrderModel {
        order_id: order.order_id.to_string(),
        user_id: order.user_id,
        amount: order.amount.map_or(0.0, double),
        status: order.status,
        // Who reads it expects JSON.
        payload_json: order.payload.map_or_else(|| "{}".to_owned(), |payload| payload.get().to_owned()),
        created_at: time(order.created_at)?,
        updated_at: time(order.updated_at)?,
        bucket: order.bucket,
    })
}

/// The double that is nearest.
pub(super) fn double(money: impl Display) -> f64 {
    money.to_string().parse().unwrap_or_default() // a decimal is a number
}
