"""Reading joint graphs and operators; changes nothing."""
