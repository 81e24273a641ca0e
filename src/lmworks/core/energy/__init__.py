"""What work on machines costs in energy, CO2 and money: formulas, models of power, and figures with year and source."""
