package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/pkg/sync/cluster"
)

// planQPS is gentle to the API server: a plan is a handful of lists.
const planQPS = 20

// planFlags are the flags of plan.
type planFlags struct {
	limits
	filename   string
	output     string
	kubeconfig string
}

func newPlanCommand(getenv func(string) string) *cobra.Command {
	f := &planFlags{}
	cmd := &cobra.Command{
		Use:   "plan -f FILE",
		Short: "Show what ImagePullSecrets would do, and change nothing",
		Long: `plan shows for each ImagePullSecret of a file, in the cluster as it is now:

  - the namespaces that it would select, by what (name, label, annotation, pods), and what would become
    of the Secret there: create, update, adopt; foreign, claimed, held; excluded, terminating; refused; and
    how many ServiceAccounts would name it, where spec.target.serviceAccounts asks for that
  - the registries that the Secret would hold, and which source wins each: the last that is listed
  - conflicts: a foreign Secret of that name, another ImagePullSecret that claims it, names and namespaces
    that the flags do not allow, sources that are missing or broken, and what is wrong with the spec

It only reads, with your own rights, and says what you may not see. Credentials are never shown. An
ImagePullSecret that is in the cluster already is taken for the same one.

Give the flags that the coordinator runs with; they can be set by the environment, too, by the variables
in brackets. FILE may hold several documents of YAML, or a list; - is the standard input.

Exit codes: 0 no conflict, as far as you may see; 1 an error; 2 conflicts.`,
		Example: `  imps-node plan -f team-a.yaml

  # What would change, were another target name allowed
  kubectl get imps team-a -o yaml | imps-node plan -f - --target-secret-names=imps-pull-secret,team-a-pull

  # In a pipeline
  imps-node plan -f team-a.yaml -o json | jq '.[].conflicts'`,
		Args: noArguments,
		RunE: checked(getenv, f.validate, f.run),
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	f.register(flags)
	flags.StringVar(&f.kubeconfig, "kubeconfig", "", "`file` that says how to reach the API server; empty: as kubectl does")
	bindEnvironment(flags)
	flags.StringVarP(&f.filename, "filename", "f", "", "`file` with the ImagePullSecrets; - for the standard input")
	flags.StringVarP(&f.output, "output", "o", outputTable, "`format`: table or json")
	completeValues(cmd, "output", outputTable, outputJSON)
	return cmd
}

func (f *planFlags) validate() error {
	var err error
	if f.filename == "" {
		err = errors.New("--filename: give the file with the ImagePullSecrets, or - for the standard input")
	}
	return errors.Join(err, oneOf("output", f.output, outputTable, outputJSON), f.limits.validate())
}

func (f *planFlags) run(cmd *cobra.Command) error {
	resources, err := f.read(cmd.InOrStdin())
	if err != nil {
		return fmt.Errorf("read %s: %w", f.filename, err)
	}
	client, err := personClient(f.kubeconfig, planQPS, "plan")
	if err != nil {
		return err
	}
	config := cluster.PlanConfig{
		Client: client, TargetSecretNames: f.targetSecretNames, SourceNamespaces: f.sourceNamespaces,
		Excluded: impsync.Exclusion(f.excludedNamespaces), AllowRescue: f.allowRescue, Alongside: resources, ECRSources: ecrSources{},
	}
	var plans []cluster.PlanResult
	conflicts := 0
	for _, resource := range resources {
		plan, err := cluster.Plan(cmd.Context(), config, resource)
		if err != nil {
			return fmt.Errorf("plan %s: %w", resource.Name, err)
		}
		plans = append(plans, plan)
		conflicts += len(plan.Conflicts)
	}
	if f.output == outputJSON {
		err = writeJSON(cmd.OutOrStdout(), plans)
	} else {
		err = writePlanTables(cmd.OutOrStdout(), plans)
	}
	if err != nil {
		return err
	}
	if conflicts > 0 {
		return errConflicts
	}
	return nil
}

func (f *planFlags) read(stdin io.Reader) ([]*v1alpha1.ImagePullSecret, error) {
	if f.filename == "-" {
		return parseResources(stdin)
	}
	file, err := os.Open(f.filename)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	return parseResources(file)
}

func writeJSON(w io.Writer, value any) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(value)
}

func writePlanTables(w io.Writer, plans []cluster.PlanResult) error {
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	for i, plan := range plans {
		if i > 0 {
			printRow(table)
		}
		planTables(table, plan)
	}
	return table.Flush()
}

func planTables(table *tabwriter.Writer, plan cluster.PlanResult) {
	state := "new"
	if plan.Exists {
		state = "exists"
	}
	printRow(table, fmt.Sprintf("ImagePullSecret %s (%s), Secret %s: %d namespaces, %d registries, %d conflicts",
		plan.Name, state, cmp.Or(plan.Target, "-"), len(plan.Namespaces), len(plan.Registries), len(plan.Conflicts)))
	accounts := slices.ContainsFunc(plan.Namespaces, func(n cluster.PlannedNamespace) bool { return n.ServiceAccounts != nil })
	columns := []string{"NAMESPACE", "SELECTED BY", "OUTCOME", "SERVICEACCOUNTS"}
	if !accounts {
		columns = columns[:3]
	}
	section(table, len(plan.Namespaces), columns...)
	for _, n := range plan.Namespaces {
		row := []string{n.Name, strings.Join(n.SelectedBy, ","), string(n.Outcome)}
		if n.ServiceAccounts != nil {
			row = append(row, strconv.Itoa(*n.ServiceAccounts))
		} else if accounts {
			row = append(row, "")
		}
		printRow(table, row...)
	}
	section(table, len(plan.Registries), "REGISTRY", "SOURCE", "OVERRIDES")
	for _, r := range plan.Registries {
		printRow(table, r.Registry, r.Source, strings.Join(r.Overrides, ","))
	}
	section(table, len(plan.Conflicts), "CONFLICT", "NAMESPACE", "WHAT")
	for _, c := range plan.Conflicts {
		printRow(table, string(c.Kind), c.Namespace, c.Message)
	}
	section(table, len(plan.Unknown), "UNKNOWN")
	for _, text := range plan.Unknown {
		printRow(table, text)
	}
	section(table, len(plan.Notes), "NOTE")
	for _, text := range plan.Notes {
		printRow(table, text)
	}
}

// section begins a table of so many rows.
func section(table *tabwriter.Writer, rows int, columns ...string) {
	if rows > 0 {
		printRow(table)
		printRow(table, columns...)
	}
}

// printRow writes cells side by side. A tabwriter keeps what it is given until Flush,
// which reports an error.
func printRow(table *tabwriter.Writer, cells ...string) {
	for i, cell := range cells {
		cells[i] = cmp.Or(cell, "-")
	}
	_, _ = fmt.Fprintln(table, strings.Join(cells, "\t"))
}
