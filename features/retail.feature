Feature: Orders of a shop
  Its people move them, step by step, from the order to the door.

  Background:
    Given orders of the lifecycle "retail"
    And user "alice" has ordered for 59.98

  Scenario: From the order to the door
    When somebody sets the status to "confirmed"
    And somebody sets the status to "shipped"
    And somebody sets the status to "delivered"
    Then that is done (200)
    And the order is "delivered"
    And the history is
      | version | to        | event                |
      | 1       | pending   | order.created        |
      | 2       | pending   | handled              |
      | 3       | confirmed | order.status_changed |
      | 4       | shipped   | order.status_changed |
      | 5       | delivered | order.status_changed |

  Scenario: No step is left out
    When somebody sets the status to "delivered"
    Then that is refused (409)
    And what is allowed is "confirmed, cancelled"
    And the order is "pending"

  Scenario: The same status again is no change
    Given somebody has set the status to "confirmed"
    When somebody sets the status to "confirmed"
    Then that is done (200)
    And the order has version 3

  Scenario: A confirmed order can be cancelled, and again
    Given somebody has set the status to "confirmed"
    When somebody cancels the order
    Then that is done (200)
    And the order is "cancelled"
    When somebody cancels the order
    Then that is done (200)
    And the order has version 4

  Scenario: A shipped order cannot be cancelled
    Given somebody has set the status to "confirmed"
    And somebody has set the status to "shipped"
    When somebody cancels the order
    Then that is refused (409)
    And what is allowed is "delivered"

  Scenario: What is ordered can change until it is confirmed
    When the client changes the amount to 70
    Then that is done (200)
    And the order is "pending"
    Given somebody has set the status to "confirmed"
    When the client changes the amount to 80
    Then that is refused (409)

  Scenario: A deleted order takes no status
    When the client deletes the order
    Then that is done (200)
    When somebody sets the status to "confirmed"
    Then that is refused (409)
    And the order is "deleted"

  Scenario: An order without a price is refused at the door
    When user "alice" orders
      """
      {"notes": "anything"}
      """
    Then that is refused as wrong (422)
    And the answer names "/amount"

  Scenario: A status that there is not
    When somebody sets the status to "lost"
    Then that is refused as wrong (422)
    And the order is "pending"

  Scenario: Nothing moves an order that was delivered
    Given somebody has set the status to "confirmed"
    And somebody has set the status to "shipped"
    And somebody has set the status to "delivered"
    When somebody cancels the order
    Then that is refused (409)
    And nothing else is allowed
    When somebody sets the status to "shipped"
    Then that is refused (409)
    And the order is "delivered"

  Scenario: Nothing moves an order that was cancelled
    When somebody cancels the order
    Then that is done (200)
    When somebody sets the status to "confirmed"
    Then that is refused (409)
    And the order is "cancelled"
