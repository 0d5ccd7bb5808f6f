# The steps themselves are scripts in deploy/, which also take arguments.
.DEFAULT_GOAL := help
.PHONY: help run run-api run-worker test test-clusters soak demo migrate bench bench-scale bench-micro lint proto compose-test down clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

run: ## Build and start everything; prints the URLs and a request to try; Ctrl-C stops it
	@deploy/run

run-api: ## Only the API (a second one takes a free port)
	@deploy/run api-service

run-worker: ## Only the worker
	@deploy/run worker

test: ## All tests, on a PostgreSQL and a Kafka of their own (ARGS="a part of a name" runs some)
	@deploy/test $(ARGS)

test-clusters: ## PostgreSQL that fails over and three brokers that die, each in turn (ROUNDS=2)
	@ROUNDS=$${ROUNDS:-2} deploy/test --show-output clusters::

soak: ## Break everything at random under load, and check what clients heard (MINUTES=10, SEED=…, CLIENTS=32)
	@deploy/soak

demo: ## Send a file of orders through the service (FILE=orders.ndjson)
	@deploy/demo $(if $(FILE),"$(FILE)")

migrate: ## Bring the database's schema up to date
	@deploy/migrate

bench: ## Measure orders per second and latencies, beside pgbench (ARGS=…)
	@deploy/bench $(ARGS)

bench-scale: ## The same with up to ten million orders stored (long; tens of GB of disk)
	@deploy/bench scale $(ARGS)

bench-micro: ## Time what each order goes through, and count its allocations (ARGS=…)
	@deploy/bench-micro $(ARGS)

lint: ## Formatting, clippy, shellcheck
	@deploy/lint

proto: ## Generate the Rust code of proto/ anew, after a change there
	@deploy/proto

compose-test: ## The end-to-end tests against containers (needs Docker)
	@deploy/compose-test

down: ## Stop whatever this checkout has running; the data stay
	@deploy/down

clean: ## Delete what was built and all local data
	@deploy/down --remove
	rm -rf .dev proto/generate/target
	cargo clean
