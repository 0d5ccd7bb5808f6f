//! Idempotency keys: claimed in the transaction of the change that they stand for.

use std::{collections::HashSet, time::Duration};

use shared::db::{Connection, Db, DbError};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{idempotency::Claim, json::Digest};

/// A key with what its request did.
#[derive(Debug)]
pub(crate) struct KeyRow<'a> {
    pub claim: &'a Claim,
    pub order_id: Uuid,
    pub version: i64,
    pub correlation_id: Uuid,
}

/// What a key has done before.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub scope: String,
    pub key: String,
    pub fingerprint: Digest,
    pub order_id: Uuid,
    pub version: i64,
    pub correlation_id: Uuid,
    pub answer_by: OffsetDateTime,
}

/// Takes those keys that are free; the correlation ids of their requests. Waits for transactions
/// that have taken one and not ended yet, in the order of the keys, so that two do not wait for
/// each other.
pub(crate) async fn claim_keys(
    connection: &Connection,
    rows: &[KeyRow<'_>],
    at: OffsetDateTime,
) -> Result<HashSet<Uuid>, DbError> {
    const SQL: &str = "
        insert into idempotency_keys
            (scope, key, fingerprint, order_id, version, correlation_id, answer_by, created_at)
        select scope, key, fingerprint, order_id, version, correlation_id, answer_by, $8::timestamptz
        from unnest($1::text[], $2::text[], $3::bytea[], $4::uuid[], $5::bigint[], $6::uuid[], $7::timestamptz[])
            as i(scope, key, fingerprint, order_id, version, correlation_id, answer_by)
        order by scope, key
        on conflict do nothing
        returning correlation_id";
    fn column<'a, T>(rows: &'a [KeyRow<'_>], of: impl Fn(&'a KeyRow<'_>) -> T) -> Vec<T> {
        rows.iter().map(of).collect()
    }
    let statement = connection.prepared(SQL).await?;
    let taken = connection
        .client()
        .query(
            &statement,
            &[
                &column(rows, |row| row.claim.scope.as_str()),
                &column(rows, |row| row.claim.key.as_str()),
                &column(rows, |row| row.claim.fingerprint.0.to_be_bytes().to_vec()),
                &column(rows, |row| row.order_id),
                &column(rows, |row| row.version),
                &column(rows, |row| row.correlation_id),
                &column(rows, |row| row.claim.answer_by),
                &at,
            ],
        )
        .await?;
    Ok(taken.iter().map(|row| row.get(0)).collect())
}

/// Gives keys free again that this very transaction took in vain.
pub(crate) async fn free_keys(connection: &Connection, claims: &[&Claim]) -> Result<(), DbError> {
    const SQL: &str = "
        delete from idempotency_keys k
        using unnest($1::text[], $2::text[]) as i(scope, key)
        where k.scope = i.scope and k.key = i.key";
    let (scopes, keys) = columns(claims);
    let statement = connection.prepared(SQL).await?;
    connection.client().execute(&statement, &[&scopes, &keys]).await?;
    Ok(())
}

/// What these keys have done, as far as they have done anything.
pub(crate) async fn find_keys(connection: &Connection, claims: &[&Claim]) -> Result<Vec<Known>, DbError> {
    const SQL: &str = "
        select k.scope, k.key, k.fingerprint, k.order_id, k.version, k.correlation_id, k.answer_by
        from unnest($1::text[], $2::text[]) as i(scope, key)
        join idempotency_keys k on k.scope = i.scope and k.key = i.key";
    let (scopes, keys) = columns(claims);
    let statement = connection.prepared(SQL).await?;
    let rows = connection.client().query(&statement, &[&scopes, &keys]).await?;
    Ok(rows
        .iter()
        .map(|row| Known {
            scope: row.get("scope"),
            key: row.get("key"),
            fingerprint: digest(row.get("fingerprint")),
            order_id: row.get("order_id"),
            version: row.get("version"),
            correlation_id: row.get("correlation_id"),
            answer_by: row.get("answer_by"),
        })
        .collect())
}

/// Forgets keys older than `ttl`, at most `limit`; how many. A smaller count means none are left.
pub(crate) async fn forget_keys(db: &Db, ttl: Duration, limit: i64) -> Result<u64, DbError> {
    // By their places: as a join it could be planned as each row with each.
    const SQL: &str = "
        delete from idempotency_keys where ctid = any(array(
            select ctid from idempotency_keys where created_at < $1 order by created_at limit $2))";
    let before = OffsetDateTime::now_utc() - ttl;
    let connection = db.connection().await?;
    let work = async {
        let statement = connection.prepared(SQL).await?;
        Ok(connection.client().execute(&statement, &[&before, &limit]).await?)
    };
    connection.within(db.settings.write_timeout, work).await
}

fn columns<'a>(claims: &[&'a Claim]) -> (Vec<&'a str>, Vec<&'a str>) {
    claims.iter().map(|claim| (claim.scope.as_str(), claim.key.as_str())).unzip()
}

fn digest(bytes: &[u8]) -> Digest {
    Digest(bytes.try_into().map_or(0, u128::from_be_bytes))
}
