Feature: Orders of marketplaces
  The worker computes what an order comes to; that is all it waits for.

  Background:
    Given orders of the lifecycle "marketplace"

  Scenario: An order is done once the worker has seen it
    When user "seller" orders
      """
      {"payload": {"id": 7, "items": [{"product_id": "book", "quantity": 2, "price": "19.99"}]}}
      """
    Then the order is taken (201)
    And the order is "done"
    And the order comes to 39.98

  Scenario: An order that cannot be computed is rejected, and may be mended
    When user "seller" orders
      """
      {"payload": {"items": "many"}}
      """
    Then that is refused as wrong (422)
    And the order is "rejected"
    When the client changes the amount to 12.50
    Then that is done (200)
    And the order is "done"
    And the order comes to 12.50

  Scenario: People put an order in processing and back
    Given user "seller" has ordered for 10
    When somebody sets the status to "processing"
    Then that is done (200)
    And the order is "processing"
    When somebody sets the status to "done"
    Then the order is "done"

  Scenario: A cancelled order takes no change
    Given user "seller" has ordered for 10
    When somebody cancels the order
    Then the order is "cancelled"
    When the client changes the amount to 20
    Then that is refused (409)
    When somebody sets the status to "done"
    Then that is refused (409)
    And nothing else is allowed

  Scenario: A rejected order waits for better content
    Given user "seller" has ordered for 10
    And the client has spoilt the order
    When somebody sets the status to "processing"
    Then that is refused (409)
    And nothing else is allowed
    When somebody cancels the order
    Then that is refused (409)
    And the order is "rejected"

  Scenario: A status that there is not
    Given user "seller" has ordered for 10
    When somebody sets the status to "lost"
    Then that is refused as wrong (422)
    And the order is "done"

  Scenario: A deleted order stays deleted
    Given user "seller" has ordered for 10
    When the client deletes the order
    Then that is done (200)
    And the order is "deleted"
    When the client changes the amount to 20
    Then that is refused (409)
    When somebody cancels the order
    Then that is refused (409)
    When the client deletes the order
    Then that is done (200)
