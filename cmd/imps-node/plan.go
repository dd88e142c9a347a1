package main

import "github.com/spf13/cobra"

func newPlanCommand(getenv func(string) string) *cobra.Command { return &cobra.Command{Use: "plan"} }
