Feature: Orders that need stock
  The product service is told of each order, and says whether it had enough.

  Background:
    Given orders of the lifecycle "stock-saga"

  Scenario: There is enough
    When user "alice" orders
      """
      {"items": [{"product_id": "book", "quantity": 2, "unit_price": 19.99}]}
      """
    Then the order is taken (201)
    And "orders_exchange" is told
      """
      {"order_id": "<order>", "user_id": "alice", "total_price": 39.98,
       "items": [{"product_id": "book", "quantity": 2, "price": 19.99}]}
      """
    When "stock_update_exchange" brings
      """
      {"order_id": "<order>", "success": true}
      """
    Then the order becomes "CONFIRMED"
    And "order_confirmed_exchange" is told
      """
      {"order_id": "<order>", "user_id": "alice"}
      """

  Scenario: There is not enough
    Given user "alice" has ordered for 10
    When "stock_update_exchange" brings
      """
      {"order_id": "<order>", "success": false, "reason": "none left"}
      """
    Then the order becomes "CANCELLED"
    And "order_cancelled_exchange" is told
      """
      {"order_id": "<order>", "user_id": "alice", "reason": "none left"}
      """

  Scenario: The same answer from two senders is told once
    Given user "alice" has ordered for 10
    When "stock_update_exchange" brings
      """
      {"order_id": "<order>", "success": true, "sender": "one"}
      """
    And "stock_update_exchange" brings
      """
      {"order_id": "<order>", "success": true, "sender": "two"}
      """
    Then all messages are handled
    And the order is "CONFIRMED"
    And the history has ignored "same: stock_reserved"
    And "order_confirmed_exchange" is told of the order 1 time

  Scenario: A refusal after the confirmation is for people to look at
    Given user "alice" has ordered for 10
    And "stock_update_exchange" has brought
      """
      {"order_id": "<order>", "success": true}
      """
    And the order has become "CONFIRMED"
    When "stock_update_exchange" brings
      """
      {"order_id": "<order>", "success": false}
      """
    Then operators see a conflict about the order
    And the order is "CONFIRMED"
    And "order_cancelled_exchange" is told of the order 0 times

  Scenario: An answer that is neither yes nor no
    Given user "alice" has ordered for 10
    When "stock_update_exchange" brings
      """
      {"order_id": "<order>", "success": "perhaps"}
      """
    Then operators see an "unreadable" message that is "dead"
    And the order is "PENDING"

  Scenario: An order without a price is refused at the door
    When user "alice" orders
      """
      {"notes": "anything"}
      """
    Then that is refused as wrong (422)
    And the answer names "/amount"

  Scenario: An order that nobody answers
    Given the setting "STOCK_TIMEOUT" is "1s"
    And user "alice" has ordered for 10
    Then the order becomes "CANCELLED"
    And "order_cancelled_exchange" is told
      """
      {"order_id": "<order>", "user_id": "alice", "reason": "stock_timed_out"}
      """

  Scenario: The same answer twice is told once
    Given user "alice" has ordered for 10
    When "stock_update_exchange" brings twice
      """
      {"order_id": "<order>", "success": true}
      """
    Then all messages are handled
    And the order is "CONFIRMED"
    And "order_confirmed_exchange" is told of the order 1 time

  Scenario: The answer is there before the order
    When "stock_update_exchange" brings, of an order that is not there yet
      """
      {"order_id": "<order>", "success": true}
      """
    Then operators see an "early" message that is "waiting"

  Scenario: Nobody changes an order whose stock is being looked for
    Given user "alice" has ordered for 10
    When the client changes the amount to 20
    Then that is refused (409)
    When somebody sets the status to "CONFIRMED"
    Then that is refused (409)
    When somebody cancels the order
    Then that is refused (409)
    And the order is "PENDING"
