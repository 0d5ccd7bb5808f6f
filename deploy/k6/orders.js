// Checks a running OrderStream (PROFILE=smoke) or puts load on it (PROFILE=load). README.md beside
// this says how.
import { check, sleep } from 'k6';
import exec from 'k6/execution';
import http from 'k6/http';
import { Rate } from 'k6/metrics';

const BASE_URL = (__ENV.BASE_URL || 'http://127.0.0.1:8080').replace(/\/+$/, '');
const PROFILE = __ENV.PROFILE || 'smoke';
const { TOKEN, USER_ID } = __ENV;

const RATE = number('RATE', 500);
const DURATION = __ENV.DURATION || '1m';
// A caller's patience, in whole seconds.
const WAIT = number('WAIT', 2);
const P95 = number('P95', 200);
const P99 = number('P99', 500);
const MAX_NOT_YET = number('MAX_NOT_YET', 0.01);
const MAX_UNAVAILABLE = number('MAX_UNAVAILABLE', 0.01);
const MAX_ERRORS = number('MAX_ERRORS', 0.001);
const MAX_DROPPED = number('MAX_DROPPED', 0.01);

const READ_EVERY = 5;
// Enough that no user is hot.
const USERS = 100000;

const notYet = new Rate('not_yet');
const unavailable = new Rate('unavailable');

const PROFILES = {
  smoke: {
    scenarios: {
      smoke: { executor: 'constant-vus', exec: 'smoke', vus: 2, duration: '10s' },
    },
    thresholds: {
      checks: ['rate==1'],
      http_req_failed: ['rate==0'],
    },
  },
  load: {
    scenarios: { answered: arrivals('answered'), accepted: arrivals('accepted') },
    thresholds: {
      // With those whose time was up (202): without them the slowest would be left out.
      'http_req_duration{name:answered}': [`p(95)<${P95}`, `p(99)<${P99}`],
      'http_req_duration{name:accepted}': [`p(95)<${P95}`, `p(99)<${P99}`],
      not_yet: [`rate<=${MAX_NOT_YET}`],
      unavailable: [`rate<=${MAX_UNAVAILABLE}`],
      http_req_failed: [`rate<=${MAX_ERRORS}`],
      checks: [`rate>=${1 - MAX_ERRORS}`],
      // A counter's rate is per second.
      dropped_iterations: [`rate<=${RATE * MAX_DROPPED}`],
    },
  },
};

if (!PROFILES[PROFILE]) {
  exec.test.abort(`PROFILE=${PROFILE} is none of: ${Object.keys(PROFILES).join(', ')}`);
}

export const options = {
  ...PROFILES[PROFILE],
  summaryTrendStats: ['avg', 'med', 'p(95)', 'p(99)', 'max'],
};

// Half of RATE. An open model: requests come when they are due, whether or not earlier ones were
// answered, as they do from clients that know nothing of each other.
function arrivals(name) {
  return {
    executor: 'constant-arrival-rate',
    exec: name,
    rate: RATE,
    timeUnit: '2s',
    duration: DURATION,
    preAllocatedVUs: Math.ceil(RATE / 10),
    // Enough even if nobody is answered before the time is up, and a second more.
    maxVUs: Math.ceil((RATE / 2) * (WAIT + 1)),
  };
}

export function setup() {
  const health = http.get(`${BASE_URL}/health`, { timeout: '5s', tags: { name: 'health' } });
  if (health.status !== 200) {
    exec.test.abort(`no OrderStream answers at ${BASE_URL}: /health gave ${health.error || health.status}`);
  }
  // Part of every external id, so that two runs never meet.
  return { run: Date.now().toString(36) };
}

// Everything that a client does with an order, once.
export function smoke({ run }) {
  // This is no load, not even where all fails at once.
  sleep(0.5);
  const order = newOrder(run);
  const create = { method: 'POST', path: '/orders', body: order.body };

  const created = step('create', create, 201, {
    'done by the worker': (answer) => answer.status === 'created' && answer.order_status === 'done',
    'the amount is that of its items': (answer) => answer.amount === order.amount,
  });
  if (!created) return;
  const id = created.order_id;
  const user = encodeURIComponent(order.user);

  step('read', { path: `/orders/${id}` }, 200, {
    'as it was sent': (read) => read.external_id === order.externalId && read.payload.customer_id === order.user,
    'as it was answered': (read) => read.version === created.order_version && read.status === 'done',
  });
  step('look up', { path: `/orders/by-external/${order.externalId}?user_id=${user}` }, 200, {
    'the same order': (found) => found.order_id === id,
  });
  step('repeat', create, 200, {
    'the first answer again': (answer) => answer.order_id === id && answer.version === created.version,
  });
  step('repeat with other content', { ...create, body: { ...order.body, notes: 'other' } }, 409, {
    'says why': (problem) => problem.type === 'urn:orderstream:problem:conflict',
  });

  const update = {
    method: 'POST',
    path: '/orders',
    body: { order_id: id, notes: 'ring twice' },
    headers: { 'Idempotency-Key': `${order.externalId}-update` },
  };
  const updated = step('update', update, 200, {
    'the next version, done': (answer) => answer.version === created.order_version + 1 && answer.order_status === 'done',
    'not a replay': (_, headers) => headers['Idempotency-Replayed'] === undefined,
  });
  step('update with the same key', update, 200, {
    'a replay of the first': (answer, headers) =>
      headers['Idempotency-Replayed'] === 'true' && answer.version === created.order_version + 1,
  });

  step('history', { path: `/orders/${id}/history` }, 200, {
    'each version once, in order': (rows) => rows.every((row, n) => row.version === n + 1),
    'all that happened': (rows) =>
      rows.map((row) => row.event).join() === 'order.created,handled,order.updated,handled',
  });
  step('list', { path: `/users/${user}/orders` }, 200, {
    'has the order': (orders) => orders.some((listed) => listed.order_id === id && listed.notes === 'ring twice'),
  });
  step('delete', { method: 'POST', path: '/orders', body: { order_id: id, status: 'deleted' } }, 200, {
    'deleted': (answer) => answer.order_status === 'deleted' && answer.version === updated?.order_version + 1,
  });
  step('read what was deleted', { path: `/orders/${id}` }, 200, {
    'deleted': (read) => read.status === 'deleted',
  });
}

// Waits for the worker.
export function answered({ run }) {
  const order = newOrder(run);
  const response = underLoad('answered', [201, 202], {
    method: 'POST',
    path: '/orders',
    body: order.body,
    headers: { Prefer: `wait=${WAIT}` },
  });
  notYet.add(response.status === 202);
  if (response.status === 201) {
    check(response.json(), {
      'answered: done': (answer) => answer.order_status === 'done',
      'answered: with the amount of its own order': (answer) => answer.amount === order.amount,
    });
  }
}

// Does not wait for the worker; some of these callers look at what they have stored.
export function accepted({ run }) {
  const order = newOrder(run);
  const response = underLoad('accepted', [201], {
    method: 'POST',
    path: '/orders',
    body: order.body,
    headers: { Prefer: 'respond-async' },
  });
  if (response.status !== 201 || exec.scenario.iterationInTest % READ_EVERY !== 0) return;

  const id = response.json('order_id');
  const user = encodeURIComponent(order.user);
  for (const [name, path, read] of [
    ['read', `/orders/${id}`, (body) => body.order_id],
    ['look up', `/orders/by-external/${order.externalId}?user_id=${user}`, (body) => body.order_id],
    ['history', `/orders/${id}/history`, (body) => body[0].event === 'order.created' && id],
    ['list', `/users/${user}/orders?limit=20`, (body) => body.some((listed) => listed.order_id === id) && id],
  ]) {
    const found = underLoad(name, [200], { path });
    if (found.status === 200) check(found.json(), { [`${name}: has the order`]: (body) => read(body) === id });
  }
}

// One request of the smoke test. `facts` are asked of its body and headers. Gives the body, or null
// where the status is another one.
function step(name, request, status, facts) {
  const response = send(name, [status], request);
  const asExpected = response.status === status;
  const body = asExpected ? response.json() : null;
  const checks = { [`${name}: ${status}`]: () => asExpected };
  for (const [fact, holds] of Object.entries(facts)) {
    checks[`${name}: ${fact}`] = () => asExpected && holds(body, response.headers);
  }
  if (!check(response, checks)) console.error(`${name}: ${response.status} ${response.error || response.body}`);
  return body;
}

// A 503 that says when to try again is the service's honest "too much"; it is counted apart.
function underLoad(name, statuses, request) {
  const response = send(name, [...statuses, 503], request);
  unavailable.add(response.status === 503);
  if (response.status === 503) {
    check(response, { '503: says when to try again': () => 'Retry-After' in response.headers });
  }
  return response;
}

function send(name, statuses, { method = 'GET', path, body = null, headers = {} }) {
  const all = { ...headers };
  if (body) all['Content-Type'] = 'application/json';
  if (TOKEN) all.Authorization = `Bearer ${TOKEN}`;
  if (USER_ID) all['X-User-Id'] = USER_ID;
  return http.request(method, BASE_URL + path, body && JSON.stringify(body), {
    headers: all,
    // Without a name each path would be a metric of its own.
    tags: { name },
    responseCallback: http.expectedStatuses(...statuses),
  });
}

// The shape and the size of a marketplace's order. Ids begin with k6- so that they are easily found.
function newOrder(run) {
  const n = exec.scenario.iterationInTest;
  const externalId = `k6-${run}-${exec.scenario.name}-${n}`;
  const user = USER_ID || `k6-user-${n % USERS}`;
  const cents = 910 + (n % 10000);
  const quantity = 1 + (n % 3);
  return {
    externalId,
    user,
    amount: (cents * quantity) / 100,
    body: {
      user_id: user,
      lifecycle: 'marketplace',
      payload: {
        id: externalId,
        customer_id: user,
        purchased_at: '2018-03-09T16:43:40Z',
        currency: 'BRL',
        items: [
          {
            product_id: `product-${n % 1000}`.padEnd(32, '0'),
            seller_id: `seller-${n % 100}`.padEnd(32, '0'),
            quantity,
            unit_price: (cents / 100).toFixed(2),
            freight: '15.10',
          },
        ],
        payments: [{ type: 'credit_card', installments: 4, value: '415.28' }],
      },
    },
  };
}

function number(name, otherwise) {
  const value = Number(__ENV[name] || otherwise);
  if (!(value >= 0)) exec.test.abort(`${name}=${__ENV[name]} is no number`);
  return value;
}
