"""The truth table's questions: (model, parameters) -> a system, solved -> the quantity that a row asks for.

models.py      which model of the table is read by which function
parameters.py  `c=4;rho=0.9;service=logn:4` as numbers and laws
stations.py    names in Kendall's notation               systems.py   everything else
known.py       a solved system, read by quantity         table.py     the CSV file
scores.py      errors, and what each row allows
"""
