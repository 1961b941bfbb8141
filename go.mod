module offloadhook

go 1.25
