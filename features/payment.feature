Feature: Orders that another service takes the money for
  Each order is told to the payment service. Its answer decides: paid, or failed.

  Background:
    Given orders of the lifecycle "payment"

  Scenario: The money is asked for when the order is handled
    When user 42 orders
      """
      {"amount": 100}
      """
    Then the order is taken (201)
    And the order is "PENDING"
    And "pay-order" is told
      """
      {"order_id": "<order>", "user_id": 42, "amount": 100}
      """
    And the message on "pay-order" has the order's id as its key

  Scenario: A payment that succeeds
    Given user 42 has ordered for 100
    When "payment-results" brings
      """
      {"order_id": "<order>", "user_id": 42, "status": "success"}
      """
    Then the order becomes "PAID"
    And the history is
      | version | to      | event         |
      | 1       | PENDING | order.created |
      | 2       | PENDING | handled       |
      | 3       | PAID    | paid          |

  Scenario: A payment that fails
    Given user 42 has ordered for 100
    When "payment-results" brings
      """
      {"order_id": "<order>", "user_id": 42, "status": "failed", "reason": "no money"}
      """
    Then the order becomes "FAILED"

  Scenario: The same answer twice
    Given user 42 has ordered for 100
    When "payment-results" brings twice
      """
      {"order_id": "<order>", "user_id": 42, "status": "success"}
      """
    Then the order becomes "PAID"
    And all messages are handled
    And the order has version 3

  Scenario: A failure after the money was taken is for people to look at
    Given user 42 has ordered for 100
    And "payment-results" has brought
      """
      {"order_id": "<order>", "user_id": 42, "status": "success"}
      """
    And the order has become "PAID"
    When "payment-results" brings
      """
      {"order_id": "<order>", "user_id": 42, "status": "failed"}
      """
    Then operators see a conflict about the order
    And the order is "PAID"
    And the history has ignored "conflict: payment_failed"
    When an operator discards what is parked for the order
    Then operators see no conflict

  Scenario: An answer that nobody can understand is no failed payment
    Given user 42 has ordered for 100
    When "payment-results" brings
      """
      {"order_id": "<order>", "user_id": 42, "status": "refunded"}
      """
    Then operators see an "unreadable" message that is "dead"
    And the order is "PENDING"

  Scenario: The answer is there before the order
    When "payment-results" brings, of an order that is not there yet
      """
      {"order_id": "<order>", "status": "success"}
      """
    Then operators see an "early" message that is "waiting"

  Scenario: An order that waits too long has failed
    Given the setting "PAYMENT_TIMEOUT" is "1s"
    When user 42 orders
      """
      {"amount": 100}
      """
    Then the order becomes "FAILED"
    And the history has "payment_timed_out"

  Scenario Outline: What a payment service cannot take is refused at the door
    When user <user> orders
      """
      <body>
      """
    Then that is refused as wrong (422)
    And the answer names "<place>"

    Examples:
      | user  | body                | place    |
      | 42    | {"amount": 10.5}    | /amount  |
      | 42    | {"amount": 0}       | /amount  |
      | 42    | {"notes": "no sum"} | /amount  |
      | alice | {"amount": 100}     | /user_id |

  Scenario: Nobody changes an order whose money is under way
    Given user 42 has ordered for 100
    When the client changes the amount to 200
    Then that is refused (409)
    When somebody sets the status to "PAID"
    Then that is refused (409)
    When somebody cancels the order
    Then that is refused (409)
    And the order is "PENDING"

  Scenario: Money for an order that has failed is for people to look at
    Given user 42 has ordered for 100
    And "payment-results" has brought
      """
      {"order_id": "<order>", "user_id": 42, "status": "failed", "reason": "no money"}
      """
    And the order has become "FAILED"
    When "payment-results" brings
      """
      {"order_id": "<order>", "user_id": 42, "status": "success"}
      """
    Then operators see a conflict about the order
    And the order is "FAILED"
    And the history has ignored "conflict: paid"

  Scenario: Money that comes after the time is up is for people to look at
    Given the setting "PAYMENT_TIMEOUT" is "200ms"
    And user 42 has ordered for 100
    And the order has become "FAILED"
    When "payment-results" brings
      """
      {"order_id": "<order>", "user_id": 42, "status": "success"}
      """
    Then operators see a conflict about the order
    And the order is "FAILED"

  Scenario: An answer for an order that never comes is given up and kept
    Given the setting "RETRY_ATTEMPTS" is "3"
    And the setting "RETRY_DELAY" is "50ms"
    When "payment-results" brings, of an order that is not there yet
      """
      {"order_id": "<order>", "status": "success"}
      """
    Then operators see an "early" message that is "dead"
