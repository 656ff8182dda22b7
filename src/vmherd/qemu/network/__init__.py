"""The networks of the host: bridges, the machines' ports, firewall rules, DHCP and DNS."""
